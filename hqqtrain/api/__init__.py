"""The functions that `import hqqtrain` gives to people who bring their own loop.

Each is a thin layer over what the tasks of the command line do, for one process and a model that is
in memory.
"""
