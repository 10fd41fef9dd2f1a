"""Corpus BLEU by sacrebleu with its standard tokenisation, from 0 to 100 (Post 2018)."""

from itertools import zip_longest

import datasets
import evaluate
from sacrebleu import corpus_bleu


class Bleu(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        forms = [datasets.Features({"predictions": text, "references": kind}) for kind in (text, datasets.List(text))]
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=forms)

    def _compute(self, predictions, references):
        references = [[texts] if isinstance(texts, str) else texts for texts in references]
        streams = list(zip_longest(*references))  # sacrebleu's way: the first reference of each row, the second, ...; None: no more
        return {"sacrebleu": corpus_bleu(predictions, streams).score}
