"""The subcommands of `python -m flash_attn`: each module has `add_options` and `run`."""
