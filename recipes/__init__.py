"""Recipes, one script each: `python -m sammed3d_backbone.recipes.NAME`, or from a checkout."""
