"""The ``stunet`` command. One module for each subcommand; heavy imports stand inside the commands."""
