"""The names under which data sets keep texts, pairs, choices, words and labels, as many of the Hub's do."""

from __future__ import annotations

import re

MODEL_INPUTS = (
    "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "flattened_patches",
)  # fmt: skip
TEXTS = (
    "text", "texts", "sentence", "review", "content", "document", "comment", "tweet", "body", "article", "post",
    "message", "utterance", "passage", "paragraph", "abstract", "prompt", "question", "query", "instruction", "input",
    "inputs", "headline", "premise", "claim", "context", "dialogue", "dialog", "story", "email", "sms", "review_body",
    "review_text", "comment_text", "tweet_text", "clean_text",
)  # fmt: skip
"""Names under which data sets keep the text that a model reads."""
OUTPUTS = (
    "completion", "response", "answer", "answers", "output", "outputs", "target", "targets", "summary", "highlights",
    "chosen", "rejected", "best_answer", "solution", "explanation", "rationale", "reasoning", "translation",
)  # fmt: skip
"""Names of columns with the text to be written, which a language model must not read."""
IDS = ("id", "example_id", "idx", "guid")
LABELS = ("label", "labels")
OTHER_IDS = re.compile(r"(.*[_-])?(id|ids|idx|guid|uuid|index|hash|url|link|path|file|filename|date|timestamp)", re.I)
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt", "system_message")
"""Names of columns that have the system message of a conversation or a prompt."""
BESIDE_CONVERSATIONS = ("context", "contexts", "passage", "passages", "functions")
"""Names of columns with the context of a conversation, which no chat template takes by that name."""
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "pos_tags", "chunk_tags", "upos", "tags", "labels", "label")
CONTEXTS = (
    "context", "article", "passage", "document", "paragraph", "story", "premise", "ctx", "sent1", "sentence", "goal",
    "text",
)  # fmt: skip
QUESTIONS = ("question", "question_stem", "query", "sent2", "prompt")
CHOICES = ("choices", "options", "endings", "candidates", "answers")
NUMBERED_CHOICE = re.compile(r"(choice|option|ending|answer|sol|solution|alternative|hypothesis)[_ ]?([0-9]|[A-E])")
NUMBERED = re.compile(r"(.*?)(_?)([12]|[abAB])")
PAIRS = (("premise", "hypothesis"), ("text", "text_pair"), ("sentence", "aspect"), ("text", "aspect"))
FIRSTS = ("question", "query", "claim")
SECONDS = ("context", "passage", "document", "sentence", "paragraph", "evidence", "article", "doc", "body", "text")
PROMPTS = ("prompt", "question", "query", "instruction")
ANSWERS = ("answer", "response", "completion")
