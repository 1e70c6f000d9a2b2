"""Running a model: rows.py, the engine; model.py, the model of a work directory as an object."""
