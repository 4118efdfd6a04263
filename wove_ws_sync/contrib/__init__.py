"""What fits the package into the frameworks that call it.

Owns: one module or folder for each framework, which imports that framework and needs its own extra.
Never: imported by the rest of the package.
"""

__all__: list[str] = []
