"""The on-disk contract: layout, manifest, shard writer, shard reader, verify."""
