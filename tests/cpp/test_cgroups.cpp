// What limits of cgroups leave of memory and CPUs, over files as the kernel shows them.
#include <doctest/doctest.h>

#include <filesystem>
#include <map>

#include "cpu/host_memory.h"
#include "cpu/thread_pool.h"
#include "file_fixtures.h"

namespace frspec::cpu {
namespace {

constexpr size_t kSystem = 1000 * 1024;  // what the system has left

class Root {
 public:
  explicit Root(const std::map<std::string, std::string>& files) {
    write("proc/meminfo", "MemTotal: 9999 kB\nMemAvailable:    1000 kB\nMemFree: 1 kB\n");
    for (const auto& [name, text] : files) write(name, text);
  }
  size_t memory() const { return available_memory(folder_.path()); }
  int threads() const { return quota_threads(folder_.path()); }

 private:
  void write(const std::string& name, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(folder_.path(name)).parent_path());
    folder_.write(name, text);
  }
  test::TempFolder folder_;
};

constexpr int kNoQuota = 1 << 16;

}  // namespace

TEST_CASE("without cgroups, the system's memory is what there is") {
  const Root root({});
  CHECK(root.memory() == kSystem);
  CHECK(root.threads() == kNoQuota);
}

TEST_CASE("limits of cgroup v2, the own one and those around it") {
  std::map<std::string, std::string> files = {
      {"proc/self/cgroup", "0::/outer/inner\n"},
      {"sys/fs/cgroup/outer/inner/memory.max", "max\n"},
      {"sys/fs/cgroup/outer/inner/memory.current", "5000\n"},
      {"sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n"},
      {"sys/fs/cgroup/outer/memory.max", "90000\n"},
      {"sys/fs/cgroup/outer/memory.current", "50000\n"},
      {"sys/fs/cgroup/outer/memory.stat", "anon 1\ninactive_file 20000\nactive_file 7\n"},
      {"sys/fs/cgroup/outer/cpu.max", "250000 100000\n"}};
  CHECK(Root(files).memory() == 90000 - (50000 - 20000));
  CHECK(Root(files).threads() == 3);  // 2.5
  files["sys/fs/cgroup/outer/inner/memory.max"] = "5001";
  files["sys/fs/cgroup/outer/inner/cpu.max"] = "10000 100000";
  CHECK(Root(files).memory() == 1);
  CHECK(Root(files).threads() == 1);
  files["sys/fs/cgroup/outer/inner/memory.max"] = "4000";  // more is used than allowed
  CHECK(Root(files).memory() == 0);
}

TEST_CASE("limits of cgroup v1") {
  const std::map<std::string, std::string> files = {
      {"proc/self/cgroup", "12:cpu,cpuacct:/box\n7:memory:/box\n3:cpuset:/box\n"},
      {"sys/fs/cgroup/memory/box/memory.limit_in_bytes", "80000\n"},
      {"sys/fs/cgroup/memory/box/memory.usage_in_bytes", "60000\n"},
      {"sys/fs/cgroup/memory/box/memory.stat", "inactive_file 5\ntotal_inactive_file 30000\n"},
      {"sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1\n"},
      {"sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n"},
      {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000\n"},
      {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}};
  const Root root(files);
  CHECK(root.memory() == 80000 - (60000 - 30000));
  CHECK(root.threads() == 4);
}

TEST_CASE("in a container, the mount is the own cgroup whatever its path is outside") {
  const Root root({{"proc/self/cgroup", "0::/docker/0123\n"},
                   {"sys/fs/cgroup/memory.max", "70000\n"},
                   {"sys/fs/cgroup/memory.current", "10000\n"},
                   {"sys/fs/cgroup/cpu.max", "200000 100000\n"}});
  CHECK(root.memory() == 60000);
  CHECK(root.threads() == 2);
}

TEST_CASE("files that say something else limit nothing") {
  const Root root({{"proc/self/cgroup", "nonsense\n0::/\n:\n"},
                   {"sys/fs/cgroup/memory.max", "plenty\n"},
                   {"sys/fs/cgroup/memory.current", "\n"},
                   {"sys/fs/cgroup/cpu.max", "1e3x\n"}});
  CHECK(root.memory() == kSystem);
  CHECK(root.threads() == kNoQuota);
}

}  // namespace frspec::cpu
