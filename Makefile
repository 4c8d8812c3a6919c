.PHONY: check test demo

check:
	ruff check .
	ruff format --check .

test:
	pytest

demo:
	python -m alignment.run recipes/tiny_grpo.yaml
