//! Compiles the calls to libfabric, against the headers in `csrc/include`. The library itself is loaded at run
//! time.

fn main() {
    println!("cargo::rerun-if-changed=csrc");
    cc::Build::new()
        .file("csrc/fabric.c")
        .std("gnu11")
        .flag("-isystemcsrc/include")
        .extra_warnings(true)
        .compile("anabranch_fabric");
    // dlopen is a library of its own before glibc 2.34.
    println!("cargo::rustc-link-lib=dl");
}
