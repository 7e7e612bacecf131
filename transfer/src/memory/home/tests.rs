use super::*;

#[test]
fn a_slot_that_does_not_fit_says_what_is_missing_and_leaves_nothing() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("shm");
    let at = ShmArena { dir: dir.path().join("anabranch-a.arena"), required: true };
    let home = Home::open(&at, "math").expect("home").expect("required");
    let error = home.slot(0, 1 << 50).err().expect("too large").to_string();
    for part in ["--shm-size", "medium: Memory", "1125899906842624", "are free"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(home.leftovers().expect("dir").is_empty());
}

#[test]
fn a_directory_that_cannot_be_used_is_an_error_only_where_it_is_required() {
    let at = |required| ShmArena { dir: PathBuf::from("/proc/no-such/a.arena"), required };
    assert!(matches!(Home::open(&at(false), "math"), Ok(None)));
    let error = Home::open(&at(true), "math").err().expect("required").to_string();
    assert!(error.contains("/proc/no-such/a.arena"), "{error}");
    let long =
        ShmArena { dir: format!("/dev/shm/{}.arena", "x".repeat(100)).into(), required: true };
    let error = Home::open(&long, "math").err().expect("too long").to_string();
    assert!(error.contains("too long for a socket"), "{error}");
}

#[test]
fn names_of_homes_tell_jobs_and_managers_apart_and_fit_a_socket() {
    let of = |job: &str, scope: &str| ShmArena::of_job(job, scope).dir;
    assert_eq!(of("math", "m:1"), of("math", "m:1"));
    assert_ne!(of("math", "m:1"), of("math", "m:2"));
    let long = of(&"ü/".repeat(200), "m:1");
    assert!(long.as_os_str().len() < 90 && long.parent() == Some("/dev/shm".as_ref()), "{long:?}");
}
