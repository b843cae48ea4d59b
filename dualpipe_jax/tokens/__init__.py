"""Text as tokens: tokenizers, chat templates, and the files of tokens to train on.

`tokenize` writes such files, with the tokenizer beside them; the training job reads
them, and keeps the tokenizer for whoever serves or exports the run.

Imports: files.
"""

from dualpipe_jax.tokens.dataset import (
    DatasetInfo as DatasetInfo,
    TokenDataset as TokenDataset,
    is_dataset as is_dataset,
)
from dualpipe_jax.tokens.learning import learn_tokenizer as learn_tokenizer
from dualpipe_jax.tokens.plain import (
    ByteTokenizer as ByteTokenizer,
    NumberTokenizer as NumberTokenizer,
    Tokenizer as Tokenizer,
)
from dualpipe_jax.tokens.published import (
    PublishedTokenizer as PublishedTokenizer,
    copy_tokenizer as copy_tokenizer,
    has_tokenizer as has_tokenizer,
    special_numbers as special_numbers,
)
from dualpipe_jax.tokens.writing import (
    Progress as Progress,
    check_folder as check_folder,
    write_tokens as write_tokens,
)
