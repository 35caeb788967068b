"""Folders that are ready to ship."""

from onnxq.deploy.deploy import KINDS, Deployment, deploy

__all__ = ["KINDS", "Deployment", "deploy"]
