"""A benchmark for anything that turns clicks into masks: one click after another, and how good.

`cases` says which objects of which volumes are asked for, `protocol` plays them with any object
that has ``set_volume``, ``click``, ``predict`` and ``reset``, `presets` holds the rules (our own
``clickbench/1`` and published ones), `scoring` rates every answer, `bench` runs a whole set,
`journal` keeps its lines and goes on with them, `summary` and `report` make tables, comparisons and
a page of them.
"""
