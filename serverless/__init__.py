"""What CVAT calls: the Nuclio function.

`sscloud package` copies `main.py` and `model_handler.py` to the top of a function folder, where Nuclio imports them by
these names; this package is where they are kept, with the yaml files as templates.
"""
