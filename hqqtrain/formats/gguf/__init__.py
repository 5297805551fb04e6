"""GGUF, the files of llama.cpp, Ollama and LM Studio: blocks, names, metadata and adapters."""
