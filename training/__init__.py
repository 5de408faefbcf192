"""CVAT → dataset → run → bundle."""
