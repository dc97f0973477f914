"""From predictions to numbers, tables and figures."""
