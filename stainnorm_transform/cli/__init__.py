"""The command ``stainnorm``: ``main.py`` and a file for each of its commands."""
