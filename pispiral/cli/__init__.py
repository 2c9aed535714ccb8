"""The `pispiral` command: one file a group of commands."""
