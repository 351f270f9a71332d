"""Which heuristics does SmolLM2 use on word-relation prompts? The first half of the demo, with public names only."""

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.demo import load_model
from hf_npeff.studies.factors import best_components
from hf_npeff.studies.word_relations import word_relation_prompts


def main(queries: int = 16, n_components: int = 12) -> None:
    model, tokenizer = load_model()
    prompts = word_relation_prompts(queries)  # dictionaries with text, word, answer and relation
    fisher = FisherConfig(rank=4, target_modules=r".*\.mlp\.(gate|up|down)_proj")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)

    pefs = analyzer.compute_pefs(prompts, batch_size=16)
    decomposition = analyzer.decompose(pefs, n_components)
    print(decomposition)

    for component in decomposition:
        top = component.top_examples(5)
        shown = [f"{q} →{a!r}" for q, a in zip(top.columns["word"], top.columns["prediction"], strict=True)]
        print(f"{component.index:3d}  stability {component.stability:.2f}  {', '.join(shown)}")

    for relation, (j, auroc) in best_components(decomposition.coefficients, pefs.columns["relation"]).items():
        print(f"{relation:14s} component {j:2d}  AUROC {auroc:.3f}")


if __name__ == "__main__":
    main()
