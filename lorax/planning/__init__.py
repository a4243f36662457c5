"""What a config would take, before it takes it; `python -m lorax.plan` is the command."""
