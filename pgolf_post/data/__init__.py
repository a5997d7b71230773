"""Text and tokens: shards on disk, the tokenizer's byte table, building, downloading and checking a data folder.

A data folder holds one tokenizer, the shards made with it, and `manifest.json`, with every file's sha256:

    data/<name>/  manifest.json  tokenizer.model
                  fineweb_train_000000.bin …  fineweb_val_000000.bin …  [fineweb_val_bytes_000000.bin …]
"""

from pgolf_post.data.folder import DataFolder
from pgolf_post.data.shards import read_shard, write_shard
from pgolf_post.data.tokenizer import BOS_ID, ByteTable, load_tokenizer

__all__ = ["BOS_ID", "ByteTable", "DataFolder", "load_tokenizer", "read_shard", "write_shard"]
