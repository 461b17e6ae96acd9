//! What a file carries besides its contents: owner, mode, ACL, extended attributes, inode flags.
//!
//! Called by [`crate::new_file`] for a file that is to replace an old one: while it is empty, and again
//! before it gets its name, for what has changed since. Either everything is carried over or the caller
//! learns what cannot be; at no point is the new file open to more users than the old one.

use std::ffi::{CStr, CString};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use rustix::fs::{IFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

/// The bits of the mode that are carried. The others (set-user-ID and so on) go with a write to the old file,
/// too.
const MODE: u32 = 0o777;

/// The attribute that is the file's ACL.
const ACL: &CStr = c"system.posix_acl_access";

/// Attributes that are about the contents: the kernel makes them anew, or drops them when a file is written.
const OF_THE_CONTENTS: [&CStr; 3] = [c"security.ima", c"security.evm", c"security.capability"];

/// The flags that a user sets. Flags that forbid writing (immutable, append only) do not get here.
const FLAGS: IFlags = IFlags::NOCOW
    .union(IFlags::COMPRESSED)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::SYNC)
    .union(IFlags::JOURNALING)
    .union(IFlags::SECURE_REMOVAL)
    .union(IFlags::UNRM)
    .union(IFlags::NOTAIL);

/// Gives `new`, which is empty and ours alone or carries what `old` did, everything that `old` carries.
///
/// # Errors
/// What cannot be carried over, as text.
pub(crate) fn carry(old: &File, new: &File) -> Result<(), String> {
    let cannot = |what: &'static str| move |e: io::Error| format!("its {what} cannot be kept ({e})");
    let read = old.metadata().and_then(|meta| Ok((meta, new.metadata()?)));
    let (meta, ours) = read.map_err(cannot("owner"))?;
    let access = |meta: &Metadata| (meta.uid(), meta.gid(), meta.mode() & MODE);
    if access(&meta) != access(&ours) {
        // What the present mode allows was meant for another owner.
        new.set_permissions(Permissions::from_mode(0o600)).map_err(cannot("mode"))?;
    }
    // On an empty file: `chattr +C` is refused later.
    flags(old, new).map_err(cannot("flags"))?;
    if (meta.uid(), meta.gid()) != (ours.uid(), ours.gid()) {
        fchown(new, Some(meta.uid()), Some(meta.gid())).map_err(cannot("owner"))?;
    }
    attributes(old, new)?;
    if access(&new.metadata().map_err(cannot("mode"))?) != access(&meta) {
        new.set_permissions(Permissions::from_mode(meta.mode() & MODE)).map_err(cannot("mode"))?;
    }
    // What counts is the outcome: a filesystem may accept what it does not keep.
    let kept = new.metadata().map_err(cannot("mode"))?;
    if access(&kept) != access(&meta) {
        return Err("its owner and mode cannot be kept".to_owned());
    }
    Ok(())
}

fn flags(old: &File, new: &File) -> io::Result<()> {
    let of = |file| match rustix::fs::ioctl_getflags(file) {
        // The filesystem has none.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(IFlags::empty()),
        other => other,
    };
    let (wanted, present) = (of(old)? & FLAGS, of(new)?);
    if present & FLAGS == wanted {
        return Ok(());
    }
    Ok(rustix::fs::ioctl_setflags(new, (present - FLAGS) | wanted)?)
}

fn attributes(old: &File, new: &File) -> Result<(), String> {
    let cannot = |name: &CStr| {
        let what =
            if name == ACL { "ACL".to_owned() } else { format!("attribute {}", name.to_string_lossy()) };
        move |e: Errno| format!("its {what} cannot be kept ({})", io::Error::from(e))
    };
    let wanted = list(old).map_err(cannot(c"list"))?;
    // A directory's default ACL has given one to the new file; it may open the file to more users than
    // before. Others were carried over and have been removed since.
    let is_ours = |name: &CStr| name == ACL || name.to_bytes().starts_with(b"user.");
    for name in list(new).map_err(cannot(c"list"))?.iter().filter(|name| is_ours(name)) {
        if !wanted.contains(name) {
            fremovexattr(new, &**name).map_err(cannot(name))?;
        }
    }
    for name in wanted.iter().filter(|name| !OF_THE_CONTENTS.contains(&&***name)) {
        let value = read(old, name).map_err(cannot(name))?;
        if read(new, name).is_ok_and(|present| present == value) {
            continue;
        }
        fsetxattr(new, &**name, &value, XattrFlags::empty()).map_err(cannot(name))?;
    }
    Ok(())
}

/// The most that the kernel gives for one file.
const MAX_LIST: usize = 64 * 1024;

fn list(file: &File) -> Result<Vec<CString>, Errno> {
    let mut names = vec![0; MAX_LIST];
    match flistxattr(file, &mut names[..]) {
        Ok(len) => names.truncate(len),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    }
    Ok(names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).flat_map(CString::new).collect())
}

fn read(file: &File, name: &CStr) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; MAX_LIST];
    let len = fgetxattr(file, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}
