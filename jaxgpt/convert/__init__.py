"""Hugging Face import and export: a family is a config mapping and a table of names, used both ways."""
