# kapsel: the two commands of a new machine are `make run` and `make test`. `make help` lists the rest.
#
# Everything that a build, a run or a test needs from Debian is named here and nowhere else.
PACKAGES_BUILD := gcc libc6-dev pkg-config libseccomp-dev libcap-ng-dev
PACKAGES_RUN   := qemu-system-x86 busybox-static e2fsprogs nftables
PACKAGES_TEST  := buildah cpio erofs-utils skopeo umoci attr iproute2 iptables podman docker.io containerd containernetworking-plugins
PACKAGES_BENCH := runc crun runsc
PACKAGES_KERNEL := linux-source-6.12 make gcc libc6-dev flex bison bc libelf-dev xz-utils
# What the Debian package needs beside PACKAGES_RUN (busybox is for the demonstration), and what it is good for.
PACKAGES_DEB_DEPENDS  := libc6 libgcc-s1 libseccomp2 libcap-ng0 $(filter-out busybox-static,$(PACKAGES_RUN))
PACKAGES_DEB_SUGGESTS := podman docker.io containerd

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

SUDO   := $(if $(filter 0,$(shell id -u)),,sudo)
TARGET := x86_64-unknown-linux-gnu
CARGO_TARGET_DIR ?= target
# Absolute, since tests that call cargo do so from their crate's directory.
export CARGO_TARGET_DIR := $(abspath $(CARGO_TARGET_DIR))
OUT    := $(CARGO_TARGET_DIR)/release
KAPSEL := $(OUT)/kapsel
AGENT  := $(OUT)/guest/kapsel-agent
MONITOR := $(OUT)/static/kapsel-vmm
# What the tests of kapsel-vmm run: the program as it is shipped.
export KAPSEL_VMM := $(abspath $(MONITOR))

.PHONY: help run test test-e2e test-kvm build agent monitor kernel image man deb bench bench-vmm clean cargo \
        packages-build packages-run packages-test packages-bench packages-kernel

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Installs the named packages, but only those that are missing: a second run asks nothing of the network. Without a run level
# (invoke-rc.d) no daemon is started: tests start their own.
define install
	@missing=(); for p in $(1); do \
	  dpkg-query -W -f='$${Status}' "$$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$$p"); done; \
	if (( $${#missing[@]} )); then \
	  echo "installing $${missing[*]}"; \
	  $(SUDO) apt-get update -qq; \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi
endef

packages-build: ; $(call install,$(PACKAGES_BUILD))
packages-run: packages-build ; $(call install,$(PACKAGES_RUN))
packages-test: packages-run ; $(call install,$(PACKAGES_TEST))
packages-bench: packages-test ; $(call install,$(PACKAGES_BENCH))
packages-kernel: ; $(call install,$(PACKAGES_KERNEL))

cargo:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust stable (1.95 or newer) with rustup, then run make again" >&2; exit 1; }

# The agent is process 1 of a guest without libraries: a static binary with a profile of its own. It goes to a folder of
# its own, so that the dynamic one that `cargo test` makes beside the other programs is never taken for it.
agent: cargo packages-build
	@RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --profile guest --target $(TARGET) -p kapsel-agent
	@install -D $(CARGO_TARGET_DIR)/$(TARGET)/guest/kapsel-agent $(AGENT)

# The monitor runs once a machine, in a jail without libraries: a static binary, optimised as a whole, is 1.6 MiB less each.
monitor: cargo packages-build
	@RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --profile guest --target $(TARGET) -p kapsel-vmm
	@install -D $(CARGO_TARGET_DIR)/$(TARGET)/guest/kapsel-vmm $(MONITOR)
	@install -D $(CARGO_TARGET_DIR)/$(TARGET)/guest/kapsel-jailer $(dir $(MONITOR))kapsel-jailer

build: agent monitor ## build everything in release mode
	@cargo build --release --workspace --exclude kapsel-agent

# Some eight minutes on two cores. Not part of any other target: without it guests have Debian's kernel.
kernel: packages-kernel ## build a slim guest kernel, for the key 'kernel' of the configuration
	@guest/build-kernel $(CARGO_TARGET_DIR)/kernel
	@echo "kernel = \"$(CARGO_TARGET_DIR)/kernel/vmlinux\" in /etc/kapsel/config.toml has sandboxes use it; docs/kernel.md says more"

image: build packages-run
	@$(KAPSEL) images --json | grep -q '"busybox:latest"\|busybox:latest' || scripts/busybox-image $(KAPSEL)

run: image ## set up this machine, then run a container in a microVM
	@scripts/demo $(KAPSEL)

test: build packages-test ## the whole test suite
	@.ci/test

test-e2e: build packages-test ## the command line's end-to-end suite: real sandboxes
	@cargo test --release -p kapsel --test e2e -- --test-threads=2 --nocapture

test-kvm: build packages-test ## the tests of kapsel-vmm on real KVM: this machine's, or an emulated host's
	@cargo test --release -p kapsel-kvmbox -p kapsel-devices -p kapsel-vmm -- --test-threads=2

man: build ## man pages and completions, into $(OUT)/man and $(OUT)/completions
	@$(KAPSEL) man $(OUT)/man
	@mkdir -p $(OUT)/completions
	@for s in bash zsh fish; do $(KAPSEL) completions $$s > $(OUT)/completions/kapsel.$$s; done

deb: build man ## a Debian package, into $(CARGO_TARGET_DIR)
	@comma=', '; depends="$(PACKAGES_DEB_DEPENDS)"; suggests="$(PACKAGES_DEB_SUGGESTS)"; \
	scripts/deb $(OUT) $(CARGO_TARGET_DIR) "$${depends// /$$comma}" "$${suggests// /$$comma}"

bench: image packages-bench ## measure side by side with runc, crun, runsc and QEMU by hand
	@cargo run --release -p kapsel-benches -- all

# With FIRECRACKER=/path/to/firecracker that one is measured beside it, in the same run.
bench-vmm: monitor packages-run ## measure kapsel-vmm on KVM, this machine's or an emulated host's, beside Firecracker
	@cargo run --release -p kapsel-benches --bin bench-vmm

clean: ## remove what the build made (images and kernels stay)
	cargo clean
