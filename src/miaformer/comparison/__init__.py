"""Methods that adapt one backbone, trained and measured alike: `miaformer compare`.

`methods`: what is compared, how each is trained from the shared backbone and asked for a budget. `harness`: trains
and measures what is not there yet, one file a method and seed. `results`: tables, intervals and differences of these.
"""

from miaformer.comparison.harness import Comparison
from miaformer.comparison.methods import ABLATIONS, METHODS, RIVALS, Method
from miaformer.comparison.results import Table, summarise

__all__ = ["ABLATIONS", "METHODS", "RIVALS", "Comparison", "Method", "Table", "summarise"]
