"""ROUGE-1, ROUGE-2 and ROUGE-L F-measures, means over the rows, from 0 to 1 (Lin 2004, as in Google's rouge_score)."""

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ["rouge1", "rouge2", "rougeL"]


class Rouge(evaluate.Metric):
    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        scorer = rouge_scorer.RougeScorer(KINDS)
        scores = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
        return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}
