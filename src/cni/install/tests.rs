use std::os::unix::fs::symlink;

use serde_json::json;

use super::*;

/// A folder that is gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroute-cni-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// As if written some time ago.
    fn age(&self, name: &str) {
        let old = std::time::SystemTime::now() - Duration::from_secs(60);
        File::options().write(true).open(self.0.join(name)).unwrap().set_modified(old).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const LIST: &str = "{\"cniVersion\":\"0.3.0\",\"name\":\"mynet\",\"plugins\":[{\"type\":\"bridge\"},{\"type\":\"portmap\"}]}\n";
const SINGLE: &str = "{\"cniVersion\":\"0.3.1\",\"name\":\"pods\",\"type\":\"bridge\"}\n";
const LOOPBACK: &str = "{\"cniVersion\":\"0.3.1\",\"name\":\"lo\",\"type\":\"loopback\"}\n";

fn none() -> Map<String, Value> {
    Map::new()
}

#[test]
fn the_first_list_by_name_takes_it_and_gives_it_back() {
    let folder = Folder::new("list");
    folder.write("10-kuberouter.conflist", LIST);
    folder.write("87-podman.conflist", LIST);
    folder.write("notes.txt", "not read by runtimes");
    fs::set_permissions(folder.0.join("10-kuberouter.conflist"), Permissions::from_mode(0o640)).unwrap();
    let done = configure(&folder.0, &none()).unwrap();
    assert_eq!((done.path.clone(), done.changed), (folder.0.join("10-kuberouter.conflist"), true));
    assert!(folder.text("10-kuberouter.conflist").contains(PLUGIN));
    assert_eq!(folder.text("87-podman.conflist"), LIST);
    assert_eq!(fs::metadata(&done.path).unwrap().mode() & 0o777, 0o640);
    assert!(!configure(&folder.0, &none()).unwrap().changed, "twice is no change");
    let before = folder.text("10-kuberouter.conflist");
    let (would, errors) = deconfigure(&folder.0, true);
    assert_eq!(errors.len(), 0);
    assert_eq!(folder.text("10-kuberouter.conflist"), before, "a dry run");
    let (did, errors) = deconfigure(&folder.0, false);
    assert_eq!((did, errors.len()), (would, 0));
    assert_eq!(folder.text("10-kuberouter.conflist"), LIST);
    assert_eq!(folder.names(), ["10-kuberouter.conflist", "87-podman.conflist", "notes.txt"]);
    assert_eq!(deconfigure(&folder.0, false).0, [] as [String; 0]);
}

#[test]
fn a_strangers_edit_between_install_and_uninstall_stays() {
    let folder = Folder::new("edit");
    folder.write("10-a.conflist", LIST);
    configure(&folder.0, &none()).unwrap();
    let edited = folder.text("10-a.conflist").replace("\"name\":\"mynet\"", "\"x\":  [1],\"name\":\"mynet\"");
    folder.write("10-a.conflist", &edited);
    deconfigure(&folder.0, false);
    assert_eq!(
        folder.text("10-a.conflist"),
        LIST.replace("\"name\":\"mynet\"", "\"x\":  [1],\"name\":\"mynet\"")
    );
}

#[test]
fn a_lone_configuration_stays_and_a_list_comes_before_it() {
    let folder = Folder::new("single");
    folder.write("10-bridge.conf", SINGLE);
    folder.write("99-loopback.conf", LOOPBACK);
    let done = configure(&folder.0, &none()).unwrap();
    assert_eq!((done.path, done.changed), (folder.0.join("00-ferroute.conflist"), true));
    assert_eq!(folder.text("10-bridge.conf"), SINGLE);
    assert!(!configure(&folder.0, &none()).unwrap().changed);
    // Its owner changes it: the list follows.
    folder.write("10-bridge.conf", &SINGLE.replace("bridge", "ptp"));
    assert!(configure(&folder.0, &none()).unwrap().changed);
    assert!(folder.text("00-ferroute.conflist").contains("ptp"));
    // A list of somebody else's that comes first takes its place.
    folder.write("05-new.conflist", LIST);
    assert_eq!(configure(&folder.0, &none()).unwrap().path, folder.0.join("05-new.conflist"));
    assert_eq!(folder.names(), ["05-new.conflist", "10-bridge.conf", "99-loopback.conf"]);
    fs::remove_file(folder.0.join("05-new.conflist")).unwrap();
    configure(&folder.0, &none()).unwrap();
    let (did, errors) = deconfigure(&folder.0, false);
    assert_eq!((did.len(), errors.len()), (1, 0));
    assert_eq!(folder.names(), ["10-bridge.conf", "99-loopback.conf"]);
}

#[test]
fn a_lone_configuration_that_goes_takes_its_list_along() {
    let folder = Folder::new("gone");
    folder.write("00-a.conf", SINGLE);
    assert_eq!(configure(&folder.0, &none()).unwrap().path, folder.0.join("00--ferroute.conflist"));
    fs::remove_file(folder.0.join("00-a.conf")).unwrap();
    assert!(matches!(configure(&folder.0, &none()), Err(Error::Nowhere { .. })));
    assert_eq!(folder.names(), [] as [String; 0]);
    folder.write("!a.conf", SINGLE);
    assert!(matches!(configure(&folder.0, &none()), Err(Error::NoName { .. })));
}

#[test]
fn what_cannot_take_it_is_named() {
    let folder = Folder::new("unfit");
    let error = configure(&folder.0, &none()).unwrap_err().to_string();
    assert!(
        error.contains("there is none") && error.contains("install the cluster's pod network"),
        "{error}"
    );
    assert!(configure(&folder.0.join("absent"), &none()).is_err());
    folder.write("05-broken.conflist", "{");
    folder.write("06-lo.conf", LOOPBACK);
    folder.write("07-old.conf", &SINGLE.replace("0.3.1", "0.2.0"));
    folder.write("10-good.conflist", LIST);
    assert!(matches!(configure(&folder.0, &none()), Err(Error::Unfinished { .. })));
    assert_eq!(folder.text("10-good.conflist"), LIST);
    folder.age("05-broken.conflist");
    let done = configure(&folder.0, &none()).unwrap();
    assert_eq!((done.path, done.skipped.len()), (folder.0.join("10-good.conflist"), 3));
    fs::remove_file(folder.0.join("10-good.conflist")).unwrap();
    let error = configure(&folder.0, &none()).unwrap_err().to_string();
    for part in ["05-broken.conflist is no network", "06-lo.conf has no plugin", "07-old.conf has cniVersion"]
    {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_list_that_would_be_empty_is_left_and_told() {
    let folder = Folder::new("only");
    let text = "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"ferroute-cni\"}]}";
    folder.write("10-a.conflist", text);
    folder.write("11-b.conflist", LIST);
    configure(&folder.0, &none()).unwrap();
    let (did, errors) = deconfigure(&folder.0, false);
    assert_eq!((did.len(), errors.len()), (1, 1));
    assert!(errors[0].to_string().contains("remove the file"), "{}", errors[0]);
    assert_eq!(
        (folder.text("10-a.conflist"), folder.text("11-b.conflist")),
        (text.to_owned(), LIST.to_owned())
    );
}

#[test]
fn settings_are_written_and_a_link_stays_one() {
    let (folder, real) = (Folder::new("link"), Folder::new("real"));
    let file = real.write("list", LIST);
    symlink(&file, folder.0.join("10-a.conflist")).unwrap();
    let settings = json!({"socket": "/x"}).as_object().unwrap().clone();
    assert!(configure(&folder.0, &settings).unwrap().changed);
    assert!(real.text("list").contains("{ \"type\": \"ferroute-cni\", \"socket\": \"/x\" }"));
    assert!(fs::symlink_metadata(folder.0.join("10-a.conflist")).unwrap().is_symlink());
    assert_eq!(real.names(), ["list"]);
}

#[test]
fn the_program_is_copied_once_and_whole() {
    let (source, bin) = (Folder::new("source"), Folder::new("bin"));
    let own = source.write("ferroute", &"program".repeat(50_000));
    let target = bin.0.join("deep/bin");
    assert!(copy_program(&own, &target).unwrap());
    assert_eq!(fs::read(target.join(PLUGIN)).unwrap(), fs::read(&own).unwrap());
    assert_eq!(fs::metadata(target.join(PLUGIN)).unwrap().mode() & 0o7777, 0o755);
    assert!(!copy_program(&own, &target).unwrap());
    // Same length, other content: an upgrade.
    source.write("ferroute", &"PROGRAM".repeat(50_000));
    assert!(copy_program(&own, &target).unwrap());
    assert!(copy_program(&source.0.join("absent"), &target).is_err());
    let names: Vec<_> = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [PLUGIN], "nothing temporary is left");
}

#[test]
fn the_program_stays_while_containers_may_need_it() {
    let (bin, cache) = (Folder::new("used"), Folder::new("cache"));
    bin.write(PLUGIN, "program");
    fs::create_dir_all(cache.0.join("results")).unwrap();
    let cached = |list: &str| {
        json!({"kind": "cniCacheV1", "containerId": "c", "config": STANDARD.encode(list), "ifName": "eth0"})
            .to_string()
    };
    let with = conflist::insert(LIST, &none()).unwrap().unwrap();
    cache.write("results/mynet-a-eth0", &cached(&with));
    cache.write("results/mynet-b-eth0", &cached(LIST));
    cache.write("results/cbr0-lo", "nonsense");
    let remove = |dry_run| remove_program(&bin.0, &cache.0, dry_run).unwrap();
    assert_eq!(remove(false), Removed::InUse(bin.0.join(PLUGIN), 1));
    fs::remove_file(cache.0.join("results/mynet-a-eth0")).unwrap();
    assert_eq!(remove(true), Removed::Gone(bin.0.join(PLUGIN)));
    assert_eq!(remove(false), Removed::Gone(bin.0.join(PLUGIN)));
    assert_eq!(remove(false), Removed::Absent);
}
