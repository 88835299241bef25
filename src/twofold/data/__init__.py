"""From files to batches: sources, conventions, chat templates, packing, the resumable loader."""

from twofold.data.batch import IGNORE_INDEX, Batch, collate
from twofold.data.chat import messages_to_example, prompt_inputs
from twofold.data.convention import Convention, Example, example_from_prompt, make_example
from twofold.data.examples import required_sentinels
from twofold.data.loader import Loader, LoaderCounts
from twofold.data.packing import Packer
from twofold.data.sources import Record, open_corpora, open_source, split_documents

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Convention",
    "Example",
    "Loader",
    "LoaderCounts",
    "Packer",
    "Record",
    "collate",
    "example_from_prompt",
    "make_example",
    "messages_to_example",
    "open_corpora",
    "open_source",
    "prompt_inputs",
    "required_sentinels",
    "split_documents",
]
