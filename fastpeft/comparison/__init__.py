"""Several methods on one model and one data set, each run in a process of its own, in one table.

The package is not called `compare`, which is the name of the public function: an import of a submodule would put
the module in the function's place.
"""
