"""Methods that adapt one backbone, trained and measured alike: `miaformer compare`.

`method`: what one is: how it is trained from the shared backbone, and how asked for a budget. `methods`: all that are
compared, of which `smaller`, `resolution` and `int8` take no research; `ablations`: ours without one of its parts.
`harness`: trains and measures what is not there yet, one file a method and seed; `measuring` and `timing` are how.
`results` and `equal_accuracy`: tables, intervals and differences of these.
"""

from miaformer.lab.comparison.ablations import ABLATIONS
from miaformer.lab.comparison.harness import Comparison
from miaformer.lab.comparison.method import Method
from miaformer.lab.comparison.methods import BASELINES, METHODS
from miaformer.lab.comparison.results import Table, summarise

__all__ = ["ABLATIONS", "BASELINES", "METHODS", "Comparison", "Method", "Table", "summarise"]
