from nanoflow_backend.serving.model import TritonPythonModel  # noqa: F401
