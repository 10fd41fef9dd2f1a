"""Corpus BLEU by sacrebleu with its standard tokenisation, from 0 to 100 (Post 2018)."""

import datasets
import evaluate
from sacrebleu import corpus_bleu


class Bleu(evaluate.Metric):
    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        return {"sacrebleu": corpus_bleu(predictions, [references]).score}
