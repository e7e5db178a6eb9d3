"""Turns this folder into a site: reference pages made from the code, and links that hold in both places."""
