"""Writes report.html, a page about one run (`rlsys report`)."""
