.PHONY: check test demo

check:
	ruff check .
	ruff format --check .

test:
	pytest -n auto --dist loadfile

demo:
	python -m alignment.run recipes/tiny_grpo.yaml
