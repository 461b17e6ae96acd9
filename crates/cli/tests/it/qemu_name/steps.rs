//! Commands one after the other, each by both programs: what each says on both streams, and its exit code.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::{Place, have_qemu};

/// Fails all requests from the first step of its kind on.
const ON_FREE: &str = "[inject-error]\nevent = \"cluster_free\"\nerrno = \"5\"\nonce = \"off\"\n";
const ON_READ: &str = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nonce = \"off\"\n";

/// Prepares a folder.
type Setup = fn(&Place);

const SCENES: &[(&str, Setup, &[&str])] = &[
    (
        "clusters of a deleted snapshot that are not freed",
        |place| {
            place.img("create -q -f qcow2 @image 4M");
            place.io("image", &["write -q -P 1 0 64k"]);
            place.img("snapshot -c foo @image");
            fs::write(place.path("rules"), ON_FREE).unwrap();
        },
        &["snapshot -d foo blkdebug:rules:image", "check image", "check -r leaks image", "check image"],
    ),
    (
        "a comparison that cannot be read",
        |place| {
            place.img("create -q -f qcow2 @image 64M");
            place.io("image", &["write -q -P 1 512 512"]);
            fs::copy(place.path("image"), place.path("same")).unwrap();
            place.img("create -q -f qcow2 @short 0");
            fs::write(place.path("rules"), ON_READ).unwrap();
        },
        &[
            "compare blkdebug:rules:image same",
            "compare same blkdebug:rules:image",
            "compare blkdebug:rules:image short",
            "compare -q short blkdebug:rules:image",
        ],
    ),
    (
        "a comparison that is not mapped",
        |place| {
            place.img("create -q -f qcow2 @image 64M");
            place.img("create -q -f qcow2 @same 64M");
        },
        &["compare --image-opts \
           driver=blkdebug,image.driver=qcow2,image.file.filename=image,inject-error.0.event=none,inject-error.0.iotype=block-status \
           driver=qcow2,file.filename=same"],
    ),
    (
        "a salvage of what is neither mapped nor read",
        |place| {
            place.img("create -q -f qcow2 @image 1M");
            place.io("image", &["write -q -P 1 0 1M"]);
        },
        &["convert --salvage -O raw --image-opts \
           driver=blkdebug,image.driver=qcow2,image.file.filename=image,inject-error.0.event=none,inject-error.0.iotype=block-status,inject-error.0.sector=801,inject-error.1.event=none,inject-error.1.iotype=read,inject-error.1.sector=801,inject-error.2.event=none,inject-error.2.iotype=block-status,inject-error.2.sector=1024 \
           copy"],
    ),
    (
        "zeros that a rebase brings up",
        |place| {
            for name in ["old", "new"] {
                place.img(&format!("create -q -f qcow2 @{name} 1M"));
            }
            place.io("new", &["write -q -P 1 0 1M"]);
            place.img("create -q -f qcow2 -b old -F qcow2 @image 2M");
        },
        &["rebase -b new -F qcow2 image", "map image", "compare image old"],
    ),
    (
        "a data file that holds zeros",
        |place| {
            place.img("create -q -f raw @data 4M");
        },
        &["create -f qcow2 -o data_file=data image 1M", "check image", "map image"],
    ),
];

/// What `program` says and how it ends, without the name of the folder.
fn run(program: &Path, place: &Place, line: &str) -> (Option<i32>, String, String) {
    let dir = place.path("image").parent().unwrap().to_owned();
    let words = line.split(' ').filter(|word| !word.is_empty());
    let output = Command::new(program).args(words).current_dir(&dir).env("LC_ALL", "C").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn each_step_says_and_ends_as_qemu_imgs() {
    if !have_qemu("each_step_says_and_ends_as_qemu_imgs") {
        return;
    }
    for (name, setup, lines) in SCENES {
        let (ours, theirs) = (Place::new(), Place::new());
        setup(&ours);
        setup(&theirs);
        let link = ours.path("qemu-img");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_blockmirror"), &link).unwrap();
        for line in *lines {
            let (a, b) = (run(&link, &ours, line), run(Path::new("qemu-img"), &theirs, line));
            assert_eq!(a, b, "{name}: {line}");
        }
        let copy = |place: &Place| fs::read(place.path("copy")).ok();
        assert!(copy(&ours) == copy(&theirs), "{name}");
    }
}

/// What an existing data file holds would be lost.
#[test]
fn a_data_file_that_holds_something_stays() {
    let place = Place::new();
    fs::write(place.path("data"), [1; 512]).unwrap();
    let link = place.path("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_blockmirror"), &link).unwrap();
    let (code, _, said) = run(&link, &place, "create -q -f qcow2 -o data_file=data image 1M");
    assert_eq!(code, Some(1));
    assert!(said.contains("would lose its contents"), "{said}");
    assert_eq!(fs::read(place.path("data")).unwrap(), [1; 512]);
}
