//! Which system calls may be made: seccomp.
//!
//! A list of what is allowed. Any other call fails with EPERM, so that a library that tries one goes on
//! without it. Calls that name files are on the list where Landlock judges the file; those that change the
//! owner or the mode of a file by its name are not, because it does not.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use crate::error::SandboxError;

/// Calls that are allowed whatever their arguments are.
const ALLOWED: &[c_long] = &[
    // Reading and writing what is open.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    // Files by name: what they hold is Landlock's to judge.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_umask,
    // Rules that leave less.
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_futex,
    libc::SYS_restart_syscall,
    // Pairs of sockets: from them alone can be received.
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    // Memory that is not executable (below), and what the allocator does with it.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_msync,
    // Threads and signals. The other filter judges `clone3`.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_membarrier,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_getrandom,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls that change what the kernel keeps of an open file besides its bytes: Landlock does not judge them,
/// also not for a file that is open for reading.
const ATTRIBUTES: &[c_long] = &[libc::SYS_fchown, libc::SYS_fsetxattr, libc::SYS_fremovexattr];

/// Older forms of calls on the list, which newer machines do not have.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_link,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(target_arch = "aarch64")]
const OLDER: &[c_long] = &[libc::SYS_renameat];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OLDER: &[c_long] = &[];

/// Requests to open files and devices: of terminals, about lengths, blocks and flags, sharing of blocks,
/// discarding and zeroing. Not: putting bytes into a terminal's input, or saying which process a signal goes
/// to.
const IOCTLS: [u64; 21] = [
    0x5401,      // TCGETS
    0x5413,      // TIOCGWINSZ
    0x541b,      // FIONREAD
    0x5421,      // FIONBIO
    0x5450,      // FIONCLEX
    0x5451,      // FIOCLEX
    0x1260,      // BLKGETSIZE
    0x125e,      // BLKROGET
    0x1261,      // BLKFLSBUF
    0x1268,      // BLKSSZGET
    0x1277,      // BLKDISCARD
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127b,      // BLKPBSZGET
    0x127f,      // BLKZEROOUT
    0x802c_542a, // TCGETS2
    0x8008_1272, // BLKGETSIZE64
    0x8008_6601, // FS_IOC_GETFLAGS
    0x4004_9409, // FICLONE
    0x4020_940d, // FICLONERANGE
    0xc020_660b, // FS_IOC_FIEMAP
];

/// Changes flags of a file, such as that it is not copied on write.
const FS_IOC_SETFLAGS: u64 = 0x4008_6602;

/// Commands of `fcntl`: descriptors, their flags, locks. Not: the process and the signal that tell of I/O
/// (`F_SETOWN`, `F_SETSIG`): the kernel would send any signal to any process of the same user.
const FCNTLS: [i32; 12] = [
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETLK,
    libc::F_SETLK,
    libc::F_SETLKW,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
];

/// Requests of `prctl`: the name of a thread, and of a run of memory; what the kernel gave the program at its
/// start; no new privileges.
const PRCTLS: [u64; 5] = [15, 16, 38, 0x4155_5856, 0x5356_4d41];

/// Leaves the thread the list; with `attributes` also what changes attributes of open files.
pub(crate) fn restrict(attributes: bool) -> Result<(), SandboxError> {
    let machine: TargetArch = std::env::consts::ARCH.try_into()?;
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let allowed = filter(rules(attributes)?, denied, SeccompAction::Allow, machine)?;
    // Its flags lie in memory, where no filter sees them: the C library takes the older call then.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let clone3 = filter(clone3, SeccompAction::Allow, missing, machine)?;
    // In this order: the list has no call that sets a filter. Of two errors for one call the newer filter's
    // would count, so the list has `clone3`.
    apply_filter(&clone3)?;
    apply_filter(&allowed)?;
    Ok(())
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn filter(
    rules: Rules,
    otherwise: SeccompAction,
    if_listed: SeccompAction,
    machine: TargetArch,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, otherwise, if_listed, machine)?.try_into()
}

fn rules(attributes: bool) -> Result<Rules, BackendError> {
    let carried = if attributes { ATTRIBUTES } else { &[] };
    let mut rules: Rules = ALLOWED.iter().chain(OLDER).chain(carried).map(|call| (*call, vec![])).collect();
    let mut only = |call: c_long, alternatives: Vec<SeccompRule>| rules.insert(call, alternatives);
    // A new thread, not a process: a process would have limits of its own.
    only(libc::SYS_clone, vec![one(bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?)?]);
    // No memory is executable that was not when the program began.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        only(call, vec![one(bits(2, libc::PROT_EXEC, 0)?)?]);
    }
    let requests = IOCTLS.into_iter().chain(attributes.then_some(FS_IOC_SETFLAGS));
    only(libc::SYS_ioctl, requests.map(|request| one(equals(1, request)?)).collect::<Result<_, _>>()?);
    let commands = FCNTLS.into_iter().map(|command| one(equals(1, command.unsigned_abs().into())?));
    only(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    // No file becomes a program that gives who runs it the rights of its owner or group.
    only(libc::SYS_fchmod, vec![one(bits(1, 0o6000, 0)?)?]);
    only(
        libc::SYS_prctl,
        PRCTLS.into_iter().map(|request| one(equals(0, request)?)).collect::<Result<_, _>>()?,
    );
    let pair = vec![equals(0, libc::AF_UNIX.unsigned_abs().into())?, bits(1, 0xf, libc::SOCK_STREAM)?];
    only(libc::SYS_socketpair, vec![SeccompRule::new(pair)?]);
    // To the other end, not to an address.
    only(
        libc::SYS_sendto,
        vec![one(SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?)?],
    );
    // Limits can be read.
    let read = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    only(libc::SYS_prlimit64, vec![SeccompRule::new(vec![equals(0, 0)?, read])?]);
    // Signals to oneself: how a program aborts.
    let own = u64::from(std::process::id());
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        only(call, vec![one(equals(0, own)?)?]);
    }
    Ok(rules)
}

fn one(condition: SeccompCondition) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![condition])
}

/// The low half of argument `index` is `value`.
fn equals(index: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// Of the bits `mask` of argument `index`, those of `value` are set and no others.
fn bits(index: u8, mask: i32, value: i32) -> Result<SeccompCondition, BackendError> {
    let mask = SeccompCmpOp::MaskedEq(mask.unsigned_abs().into());
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, mask, value.unsigned_abs().into())
}
