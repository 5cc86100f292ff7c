"""The foundation: views of backbones, the registry of methods and families, layer proxies, shared layers, schemas."""
