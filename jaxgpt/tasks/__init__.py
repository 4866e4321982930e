"""The tasks that come with jaxgpt, one file each; docs/tasks.md lists them. Nothing here imports jax."""

from jaxgpt.tasks.arithmetic import Arithmetic
from jaxgpt.tasks.data_to_text import DataToText
from jaxgpt.tasks.dialogue import Dialogue
from jaxgpt.tasks.entities import Entities
from jaxgpt.tasks.extractive_qa import ExtractiveQA
from jaxgpt.tasks.generation import Generation
from jaxgpt.tasks.multiple_choice import MultipleChoice
from jaxgpt.tasks.open_qa import OpenQA
from jaxgpt.tasks.query_summarization import QuerySummarization
from jaxgpt.tasks.recommendation import Recommendation
from jaxgpt.tasks.summarization import Summarization
from jaxgpt.tasks.support import Support
from jaxgpt.tasks.text_classification import TextClassification
from jaxgpt.tasks.translation import Translation

__all__ = [
    "Arithmetic",
    "DataToText",
    "Dialogue",
    "Entities",
    "ExtractiveQA",
    "Generation",
    "MultipleChoice",
    "OpenQA",
    "QuerySummarization",
    "Recommendation",
    "Summarization",
    "Support",
    "TextClassification",
    "Translation",
]
