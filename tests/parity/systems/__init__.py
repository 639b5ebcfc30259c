"""One file per system; its functions, marked ``@component(system, component)``, recompute the outputs of a case."""
