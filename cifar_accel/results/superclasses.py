"""The twenty super-classes of CIFAR-100 (Krizhevsky 2009), of five classes each."""

CIFAR100 = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household devices": "clock keyboard lamp telephone television",
    "furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made things": "bridge castle house road skyscraper",
    "large natural scenes": "cloud forest mountain plain sea",
    "large herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium mammals": "fox porcupine possum raccoon skunk",
    "invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}

# The hub's copy has lost a letter of one name.
OTHER_SPELLINGS = {"cra": "crab"}


def superclass_of(classes: list[str]) -> list[str] | None:
    """The super-class of each of `classes`; None where they are not those of CIFAR-100."""
    found = {name: above for above, names in CIFAR100.items() for name in names.split()}
    spelled = [OTHER_SPELLINGS.get(name, name) for name in classes]
    if sorted(spelled) != sorted(found):
        return None
    return [found[name] for name in spelled]
