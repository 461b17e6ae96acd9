//! Which images there are, and the commands that make each.
//!
//! The names tell version, cluster size and feature: `v3-64k-zstd.qcow2`. Guest data is cut from
//! `stamps.bin`, whose sectors all differ, and written out of order, so that neither a wrong sector nor a
//! wrong cluster can pass for the right one.

use std::path::Path;

use blockmirror_testing::{Outcome, qemu};

/// The file that guest data is cut from.
pub(super) const STAMPS: &str = "stamps.bin";
/// Its length in bytes.
pub(super) const STAMPS_LEN: usize = 64 << 10;

/// How to make one image.
pub(super) struct Recipe {
    /// The image to open.
    pub(super) file: String,
    /// Its format.
    pub(super) format: &'static str,
    /// Files beside it that it needs: backing and data files.
    pub(super) kept: Vec<String>,
    /// Programs with their arguments, in order.
    pub(super) commands: Vec<Vec<String>>,
    /// Whether reading it needs a secret, so that no checksum can be taken.
    pub(super) secret: bool,
    /// Why it must not be written.
    pub(super) read_only_because: Option<&'static str>,
}

impl Recipe {
    /// Length of the disk, as `qemu-img info` tells.
    pub(super) fn virtual_size(&self, dir: &Path) -> Outcome<u64> {
        let text = qemu::run("qemu-img", dir, ["info", "--output=json", "-f", self.format, &self.file])?;
        let info: serde_json::Value = serde_json::from_str(&text)?;
        info["virtual-size"].as_u64().ok_or_else(|| format!("no virtual-size in {text}").into())
    }
}

/// A cluster size of the matrix.
#[derive(Clone, Copy)]
struct Cluster {
    name: &'static str,
    bytes: u64,
    /// Length of the disks: several L2 tables where that stays small, and never whole clusters.
    disk: u64,
}

const CLUSTERS: [Cluster; 4] = [
    Cluster { name: "512", bytes: 512, disk: (300 << 10) + 512 },
    Cluster { name: "4k", bytes: 4 << 10, disk: (5 << 20) + 1024 },
    Cluster { name: "64k", bytes: 64 << 10, disk: (4 << 20) + 1536 },
    Cluster { name: "2m", bytes: 2 << 20, disk: (19 << 20) + 512 },
];

/// Every image of the folder.
pub(super) fn all() -> Vec<Recipe> {
    let mut all = Vec::new();
    for cluster in CLUSTERS {
        for v3 in [false, true] {
            matrix(&mut all, v3, cluster);
        }
    }
    specials(&mut all);
    all
}

fn matrix(all: &mut Vec<Recipe>, v3: bool, c: Cluster) {
    let compat = if v3 { "1.1" } else { "0.10" };
    let options = |more: &str| {
        let comma = if more.is_empty() { "" } else { "," };
        format!("compat={compat},cluster_size={}{comma}{more}", c.bytes)
    };
    let name = |feature: &str| format!("{}-{}-{feature}", if v3 { "v3" } else { "v2" }, c.name);

    all.push(Build::new(name("plain")).create(&options(""), c.disk).writes(&scattered(c, 0)).done());
    for mode in ["metadata", "falloc", "full"] {
        let options = options(&format!("preallocation={mode}"));
        let build = Build::new(name(&format!("prealloc_{mode}")));
        all.push(build.create(&options, c.disk).writes(&scattered(c, 0)).done());
    }
    all.push(compressed(name("deflate"), &options(""), c));
    all.push(chain(&name("chain"), &options(""), c));
    all.push(zeroes(name("zeroes"), &options(""), c));
    if !v3 {
        return;
    }
    all.push(compressed(name("zstd"), &options("compression_type=zstd"), c));
    for (feature, option) in [
        ("refcount1", "refcount_bits=1"),
        ("refcount8", "refcount_bits=8"),
        ("refcount64", "refcount_bits=64"),
        ("lazy", "lazy_refcounts=on"),
    ] {
        let build = Build::new(name(feature));
        all.push(build.create(&options(option), c.disk).writes(&scattered(c, 0)).done());
    }
    for (feature, more) in [("data_file", ""), ("data_file_raw", ",data_file_raw=on")] {
        let name = name(feature);
        let data = format!("{name}.data");
        let mut build = Build::new(name);
        build.recipe.kept.push(data.clone());
        let options = options(&format!("data_file={data}{more}"));
        all.push(build.create(&options, c.disk).writes(&scattered(c, 0)).writes(&erasures(c)).done());
    }
    if c.bytes >= 16 << 10 {
        extended(all, &options("extended_l2=on"), &name, c);
    }
}

fn extended(all: &mut Vec<Recipe>, options: &str, name: &dyn Fn(&str) -> String, c: Cluster) {
    let sub = c.bytes / 32;
    let subclusters = [
        format!("write -s {STAMPS} {} {}", 2 * c.bytes + 3 * sub, sub),
        format!("write -s {STAMPS} {} {}", 2 * c.bytes + 9 * sub + 512, 512),
        format!("write -z {} {}", 2 * c.bytes + 4 * sub, 2 * sub),
        format!("write -z -u {} {}", 7 * c.bytes, 5 * sub),
    ];
    let build = Build::new(name("extended_l2"));
    all.push(build.create(options, c.disk).writes(&scattered(c, 0)).writes(&subclusters).done());
    all.push(compressed(name("extended_l2_deflate"), options, c));
    all.push(chain(&name("extended_l2_chain"), options, c));
}

/// Data at the start, the end, across clusters and inside one, in an order that is not the guest's.
fn scattered(c: Cluster, shift: u64) -> Vec<String> {
    let unit = c.bytes.min(STAMPS_LEN as u64);
    let middle = (c.disk / 2) & !(c.bytes - 1);
    let place = |offset: u64, len: u64| {
        let offset = offset + shift * c.bytes;
        let len = len.min(c.disk.saturating_sub(offset));
        format!("write -s {STAMPS} {offset} {len}")
    };
    vec![
        place(7 * c.bytes, 2 * unit),
        place(middle - 512, 1024),
        place(3 * c.bytes + 512, 1024),
        format!("write -s {STAMPS} {} 512", c.disk - 512),
        place(0, unit),
        place(middle + 2 * c.bytes, unit / 2 + 512),
    ]
}

/// Zeros over data, over nothing, in part of a cluster; discarded clusters.
fn erasures(c: Cluster) -> Vec<String> {
    vec![
        format!("write -z {} {}", c.bytes, 2 * c.bytes),
        format!("write -z -u {} {}", 7 * c.bytes, c.bytes),
        format!("discard {} {}", 3 * c.bytes, c.bytes),
        format!("write -z {} 512", 5 * c.bytes),
    ]
}

/// Compressed clusters, some of them overwritten, one written raw beside them.
fn compressed(name: String, options: &str, c: Cluster) -> Recipe {
    let plain = format!("{name}.plain");
    let unit = c.bytes.min(STAMPS_LEN as u64);
    let mut build = Build::new(name);
    build.command(&["qemu-img", "create", "-q", "-f", "qcow2", &plain, &c.disk.to_string()]);
    build.io(&plain, &scattered(c, 0));
    let image = build.recipe.file.clone();
    build
        .command(&["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options, &plain, &image]);
    let over = [format!("write -s {STAMPS} {} {}", 7 * c.bytes + 512, unit.min(1024) / 2)];
    build.writes(&over).done()
}

/// An overlay over an overlay over a shorter base, each with data and zeros of its own.
fn chain(name: &str, options: &str, c: Cluster) -> Recipe {
    let (base, middle) = (format!("{name}-base.qcow2"), format!("{name}-middle.qcow2"));
    let mut build = Build::new(name.to_owned());
    let short = (c.disk / 3 * 2) & !511;
    build.command(&["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, &base, &short.to_string()]);
    let inside: Vec<_> = scattered(c, 0).into_iter().filter(|w| ends_before(w, short)).collect();
    build.io(&base, &inside);
    let top = build.recipe.file.clone();
    for (image, backing) in [(&middle, &base), (&top, &middle)] {
        let size = c.disk.to_string();
        build.command(&[
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", backing, "-F", "qcow2", image,
            &size,
        ]);
    }
    let mut over = scattered(c, 1);
    over.push(format!("write -z {} {}", 7 * c.bytes, c.bytes));
    build.io(&middle, &over);
    build.io(&top, &[format!("write -s {STAMPS} 512 512"), format!("write -z {} 1024", 3 * c.bytes)]);
    build.recipe.kept = vec![base, middle];
    build.done()
}

/// Whether a write command ends at or before `limit`.
fn ends_before(write: &str, limit: u64) -> bool {
    let numbers: Vec<u64> = write.split(' ').filter_map(|w| w.parse().ok()).collect();
    numbers.iter().sum::<u64>() <= limit
}

/// Zero clusters of every sort, without and above data of a backing file.
fn zeroes(name: String, options: &str, c: Cluster) -> Recipe {
    let base = format!("{name}-base.qcow2");
    let mut build = Build::new(name);
    build.command(&["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, &base, &c.disk.to_string()]);
    build.io(&base, &scattered(c, 0));
    build.io(&base, &erasures(c));
    let top = build.recipe.file.clone();
    build.command(&[
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", &base, "-F", "qcow2", &top,
    ]);
    build.recipe.kept = vec![base];
    build.writes(&erasures(c)).writes(&scattered(c, 2)).done()
}

/// Images outside the matrix: sizes at the edges, and those that must not be written.
fn specials(all: &mut Vec<Recipe>) {
    for size in [0u64, 512, 65536 + 512] {
        let build = Build::new(format!("v3-64k-size{size}"));
        let build = build.create("", size);
        let whole = if size == 0 { vec![] } else { vec![format!("write -s {STAMPS} 0 {size}")] };
        all.push(build.writes(&whole).done());
    }
    let extended = Cluster { name: "16k", bytes: 16 << 10, disk: (2 << 20) + 512 };
    let options = "cluster_size=16k,extended_l2=on";
    let build = Build::new("v3-16k-extended_l2_zeroes".to_owned()).create(options, extended.disk);
    all.push(build.writes(&scattered(extended, 0)).writes(&erasures(extended)).done());

    let mut raw = Build::new("plain".to_owned());
    raw.recipe.file = "odd.raw".to_owned();
    raw.recipe.format = "raw";
    raw.command(&[
        "qemu-img",
        "dd",
        "-f",
        "raw",
        "-O",
        "raw",
        "bs=1000",
        "count=1",
        "if=stamps.bin",
        "of=odd.raw",
    ]);
    raw.command(&["truncate", "-s", "1000", "odd.raw"]);
    all.push(raw.done());
    not_writable(all);
}

/// Images that are read only.
fn not_writable(all: &mut Vec<Recipe>) {
    let small = |name: &str, options: &str| {
        let options = format!("cluster_size=4k{options}");
        Build::new(name.to_owned())
            .create(&options, 1 << 20)
            .writes(&[format!("write -s {STAMPS} 40960 20480")])
    };
    let mut snapshot = small("v3-4k-snapshot", "");
    snapshot.recipe.read_only_because = Some("snapshots");
    let file = snapshot.recipe.file.clone();
    snapshot.command(&["qemu-img", "snapshot", "-c", "before", &file]);
    all.push(snapshot.writes(&[format!("write -s {STAMPS} 45056 4096")]).done());

    let mut bitmap = small("v3-4k-bitmap", "");
    bitmap.recipe.read_only_because = Some("bitmaps");
    let file = bitmap.recipe.file.clone();
    bitmap.command(&["qemu-img", "bitmap", "--add", "-g", "4k", &file, "dirt"]);
    all.push(bitmap.writes(&[format!("write -s {STAMPS} 81920 4096")]).done());

    let mut dirty = small("v3-4k-dirty", ",lazy_refcounts=on");
    dirty.recipe.read_only_because = Some("dirty");
    let killed = [format!("write -s {STAMPS} 81920 4096"), "flush".to_owned(), "sigraise 9".to_owned()];
    all.push(dirty.writes(&killed).done());

    let mut aes = Build::new("v2-4k-aes".to_owned());
    aes.recipe.secret = true;
    aes.recipe.read_only_because = Some("encrypted");
    let file = aes.recipe.file.clone();
    aes.command(&[
        "qemu-img",
        "create",
        "-q",
        "--object",
        "secret,id=s,data=test",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10,cluster_size=4k,encrypt.format=aes,encrypt.key-secret=s",
        &file,
        "1M",
    ]);
    all.push(aes.done());
}

/// A recipe being written.
struct Build {
    recipe: Recipe,
}

impl Build {
    fn new(name: String) -> Self {
        let recipe = Recipe {
            file: format!("{name}.qcow2"),
            format: "qcow2",
            kept: Vec::new(),
            commands: Vec::new(),
            secret: false,
            read_only_because: None,
        };
        Self { recipe }
    }

    fn command(&mut self, words: &[&str]) {
        self.recipe.commands.push(words.iter().map(|w| (*w).to_owned()).collect());
    }

    fn create(mut self, options: &str, size: u64) -> Self {
        let file = self.recipe.file.clone();
        let mut words = vec!["qemu-img", "create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            words.extend(["-o", options]);
        }
        let size = size.to_string();
        words.extend([file.as_str(), size.as_str()]);
        self.command(&words);
        self
    }

    /// Runs `qemu-io` commands on `image`.
    fn io(&mut self, image: &str, script: &[String]) {
        if script.is_empty() {
            return;
        }
        // Discards must reach the format, or nothing is freed.
        let mut words = vec!["qemu-io", "-d", "unmap", "-f", "qcow2"];
        for command in script {
            words.extend(["-c", command]);
        }
        words.push(image);
        self.command(&words);
    }

    fn writes(mut self, script: &[String]) -> Self {
        let image = self.recipe.file.clone();
        self.io(&image, script);
        self
    }

    fn done(self) -> Recipe {
        self.recipe
    }
}
