"""The commands of lora.py: adapters and whole models in the forms that transformers, PEFT and vLLM read."""
