"""Switch one component of SmolLM2 off with a rank-1 LoRA, and see what changes and what does not."""

from peft import PeftModel

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.demo import load_model
from hf_npeff.studies.factors import purity
from hf_npeff.studies.word_relations import word_relation_prompts


def main(queries: int = 16, n_components: int = 12, folder: str = "runs/adapter") -> None:
    model, tokenizer = load_model()
    prompts = word_relation_prompts(queries)
    fisher = FisherConfig(rank=4, target_modules=r".*\.mlp\.(gate|up|down)_proj")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    pefs = analyzer.compute_pefs(prompts, batch_size=16)
    decomposition = analyzer.decompose(pefs, n_components)

    purest = max(decomposition, key=lambda c: purity(c.top_examples(10).columns["relation"])[1])
    direction = analyzer.lift(decomposition, purest.index, pefs, prompts)
    report = analyzer.evaluate_direction(direction, decomposition, purest.index, prompts, target_kl=1.0)
    print(purest, direction, report, sep="\n")
    for row in report.changed:
        print("top  " if row["top"] else "other", repr(row["text"][-20:]), repr(row["before"]), "→", repr(row["after"]))

    direction.to_adapter(rank=1, scale=report.scale).save_pretrained(folder)
    print(PeftModel.from_pretrained(model, folder).active_adapters, "loaded from", folder)


if __name__ == "__main__":
    main()
