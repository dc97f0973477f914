"""The MONAI side: networks built on any encoder that fulfils `contract.py`."""
