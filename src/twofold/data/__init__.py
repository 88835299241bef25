"""From files to batches: sources, token stores, held-out splits, conventions, packing, the resumable loader."""

from twofold.data.batch import IGNORE_INDEX, Batch, collate
from twofold.data.build import BuildProgress, build_store
from twofold.data.chat import messages_to_example, prompt_inputs
from twofold.data.convention import Convention, Example, example_from_prompt, make_example
from twofold.data.examples import longest_text, required_sentinels
from twofold.data.loader import Loader
from twofold.data.packing import Packer
from twofold.data.prefetch import Prefetcher
from twofold.data.sources import Record, SourceReader
from twofold.data.split import Corpus, open_corpora, split_documents
from twofold.data.store import TokenStore
from twofold.data.stream import Exhausted, LoaderCounts

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BuildProgress",
    "Convention",
    "Corpus",
    "Example",
    "Exhausted",
    "Loader",
    "LoaderCounts",
    "Packer",
    "Prefetcher",
    "Record",
    "SourceReader",
    "TokenStore",
    "build_store",
    "collate",
    "example_from_prompt",
    "longest_text",
    "make_example",
    "messages_to_example",
    "open_corpora",
    "prompt_inputs",
    "required_sentinels",
    "split_documents",
]
