"""The project file, pipeline.yaml."""
