"""A synthetic laser scanner: seeded scenes of streets and yards, ray-cast into normals panoramas with their masks."""
