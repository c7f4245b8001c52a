# The two commands of the README are `make train` and `make test`; each sets up `.venv` first when it is missing or stale.
#   PYTHON=python3.12      the interpreter that `.venv` is made from
#   PIP_ARGS="--index-url …"  handed to pip as they are, for a particular build of torch, say
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install train test lab docs clean
install: $(INSTALLED)

$(INSTALLED): constraints.txt settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev,docs,lab]"
	touch $@

train: $(INSTALLED)
	$(BIN)/papermill nbs/train.ipynb out.ipynb -p lr 0.5

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

lab: $(INSTALLED)
	$(BIN)/jupyter lab nbs/explore.ipynb

docs: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/tformer_docs

clean:
	rm -rf _docs _proc assets build dist *.egg-info
