"""Constraints on the output: JSON schemas, regular expressions and grammars, within limits."""
