"""ROUGE-1, ROUGE-2 and ROUGE-L F-measures, means over the rows, from 0 to 1 (Lin 2004, as in Google's rouge_score).

Of several references of a row the one that scores best counts, for each of the three by itself (Lin 2004, section 2.1).
"""

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ["rouge1", "rouge2", "rougeL"]


class Rouge(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        forms = [datasets.Features({"predictions": text, "references": kind}) for kind in (text, datasets.List(text))]
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=forms)

    def _compute(self, predictions, references):
        scorer = rouge_scorer.RougeScorer(KINDS)
        references = [[texts] if isinstance(texts, str) else texts for texts in references]
        scores = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
        return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}
